"""vhost-user: the codec, both connection state machines, memory tables and the in-flight region.  ``channel`` owns the socket."""
