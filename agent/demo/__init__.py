"""One boot on simulated silicon with a real model and a real model server, for people to watch.

Owns the stage around a boot: model conversion, artifact server, model server launcher, orchestration and its view.
Nothing of it is in a guest image. No part of a boot is replaced or shortened: the agent it starts is the same program
with the same steps, and only the configuration names the simulated machine.
"""
