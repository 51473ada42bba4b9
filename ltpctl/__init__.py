"""The command line: parsing, wiring and presentation. No decision lives here."""

__version__ = "0.1.0"
