"""Generation of training rows by a model on a server: parts shared by SYSGEN and the Multifaceted Collection."""
