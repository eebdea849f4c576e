"""The network: configuration, backbone, heads and memory."""
