"""What the commands of ``dph.cli`` do: a function each, named after its command, that takes the parsed arguments."""
