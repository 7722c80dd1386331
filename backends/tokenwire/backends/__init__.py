"""tokenwire.backends: where events come from. Modules are imported by name."""
