"""tokenwire.core.testing: tools to test streams without sockets, clocks or sleeps. Modules are imported by name."""
