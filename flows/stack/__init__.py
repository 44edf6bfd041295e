"""Everything that unattended runs need, as local processes under one supervisor: `python -m flows.stack`."""
