"""Records, readers, rewards, prompt ids and exports: what comes in from files and what goes out."""
