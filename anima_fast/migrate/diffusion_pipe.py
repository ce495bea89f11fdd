def convert(source, ledger):
    raise NotImplementedError
