"""The ``viommu`` command: parsing with click, output with rich, one module a subcommand."""
