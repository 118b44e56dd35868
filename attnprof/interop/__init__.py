"""What other tools write and read: PyTorch's memory snapshots in, and four formats out."""
