"""The laboratory: one package a room, from the ground (`lab.system`) up (`lab.sweeping`)."""
