"""The configuration groups of the commands, which Hydra reads as `pkg://revnet.conf`."""
