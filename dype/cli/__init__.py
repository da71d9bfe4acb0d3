"""The command line of run_dype.py: its flags, how they become settings, and checks of them."""
