"""tokenwire.adapters: where bytes go. Modules are imported by name."""
