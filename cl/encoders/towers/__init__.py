"""Families of towers; every module here registers one."""
