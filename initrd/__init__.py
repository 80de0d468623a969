"""What is shipped, and how it is made: see `build.py`. Not part of the agent."""
