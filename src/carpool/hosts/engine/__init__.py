"""What the hosts of serving engines share: settings, rows, routing, proof, counters, changes at run time."""
