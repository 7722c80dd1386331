"""tokenwire.core.dialects: the languages that clients speak, one file each. Modules are imported by name."""
