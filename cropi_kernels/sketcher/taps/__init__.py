"""One tap for each way in which a module uses its parameters: what it keeps in forward, what it adds in backward."""
