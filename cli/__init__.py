"""The command line: thin commands, a file each; heavy imports only when a command runs."""
