"""Configurations of other trainers as ours: sd-scripts, kohya_ss' GUI, diffusion-pipe, OneTrainer.

`source.py` tells what a text or file is; one module for each trainer fills a `Ledger`
(`ledger.py`), in which every key of the source ends as taken over, changed or dropped, from tables
(`rows.py`) where a key has one counterpart; `write.py` writes the TOML files and the lists;
`importer.py` puts it together.
"""
