"""The computations of a study, each callable from Python, the command line and a rule."""
