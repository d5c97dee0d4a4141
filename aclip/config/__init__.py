"""What a run is made of: the recipe, the ds_config, the command line."""
