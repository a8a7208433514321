"""A run's folder on disk: how it is made, its status, its tables read with distrust; no torch."""
