"""What a chapter needs beside the kit: checks with hints, tables of words, the probe of what this machine offers."""
