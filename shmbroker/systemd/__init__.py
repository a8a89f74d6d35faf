"""Units for systemd, and telling it how a service is."""
