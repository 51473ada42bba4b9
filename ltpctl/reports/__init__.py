"""How results look: on a terminal, in a browser, in a CI system."""
