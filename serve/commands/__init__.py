"""The bodies of the commands, one file each. What a command needs is imported when it runs."""
