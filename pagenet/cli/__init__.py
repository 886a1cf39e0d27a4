"""The commands: arguments, output, exit codes. The library does all of the work."""
