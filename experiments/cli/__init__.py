"""The command line: arguments, values of keys, and configs as JSON."""
