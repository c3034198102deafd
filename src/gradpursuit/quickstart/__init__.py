"""The main job on a real model and real data, in one command."""
