"""What the commands of `metalearn` do."""
