"""Where Ray runs: the session every command starts or attaches to, and the doctor that looks at machines."""
