"""The ``dph`` command."""
