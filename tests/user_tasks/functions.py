"""What the YAMLs beside this file refer to by `!function`."""

import datasets


def load_antonyms(**_):
    pairs = [("hot", ["cold", "cool"]), ("big", ["small", "little"]), ("fast", ["slow"]), ("up", ["down"])]
    pairs += [("wet", ["dry"]), ("old", ["new", "young"]), ("full", ["empty"]), ("hard", ["soft", "easy"])]
    rows = [{"word": word, "opposites": opposites} for word, opposites in pairs]
    return {"test": datasets.Dataset.from_list(rows)}


def only_short(docs):
    return docs.filter(lambda doc: len(doc["country"]) < 6).map(lambda doc: {"question": doc["country"].upper()})


def more_examples():
    return [{"question": "IRAQ", "capital": "Baghdad"}, {"question": "OMAN", "capital": "Muscat"}]
