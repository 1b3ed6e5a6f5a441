"""Links: how KV travels between ranks. `plan` says what goes where; every other module carries that out."""
