"""Low-rank networks on top of frozen models, and the file formats they are exchanged in."""
