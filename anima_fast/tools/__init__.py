"""Commands on finished files: convert, merge, extract, resize and remap."""
