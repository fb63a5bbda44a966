"""One file per command; the parser of the top level imports nothing heavy."""
