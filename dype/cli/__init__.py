"""The command line of run_dype.py: flags, their settings, what is refused."""
