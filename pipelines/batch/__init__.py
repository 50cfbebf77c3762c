"""Batch generation that loses nothing: rows of a file to pictures and one manifest, by one process or many.

A run is a folder. `setup` says what is asked for, `ledger` keeps what is done of it, `items` reads the rows, `work`
draws them, `run` puts these together on one machine, and `on_ray` on many. `manifest` and `views` are made in the end.
"""
