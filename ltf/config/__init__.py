"""A run as a person writes it: the schema, and reading it from YAML with overrides."""
