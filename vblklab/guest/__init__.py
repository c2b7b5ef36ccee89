"""The guest's side: the application (fio jobs) and the virtio-blk driver."""
