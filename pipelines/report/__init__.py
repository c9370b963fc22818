"""The report: one self-contained HTML page over any set of run folders, and the summary that `clew demo` prints.

`pipelines.report.build.build_report` writes the page, `pipelines.report.summary.summarise` computes the numbers at
its head; both read nothing but what the runs left on disk.
"""
