"""What a group is, and group-structured splits of pictures or vectors."""
