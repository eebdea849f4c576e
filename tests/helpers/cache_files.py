"""Files of the cache of frozen outputs, and damage to them."""

from safetensors.torch import load_file, save_file


def shards(directory):
    return sorted(directory.rglob("*.safetensors"))


def spoil(shard, row):
    """Change a row's numbers, as a disk may, and not its check."""
    held = load_file(shard)
    held["values"][row] += 1
    save_file(held, shard)
