"""Configuration: the schema, the rules between fields, and the reader of YAML files."""
