"""The `aspo` command."""
