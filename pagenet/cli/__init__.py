"""The daemons: arguments, words on a screen, exit codes. All work is the library's."""
