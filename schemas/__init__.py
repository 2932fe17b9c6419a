"""The doors: schemas of tables, keys, cards, configs and errors. Imports neither torch nor ray."""
