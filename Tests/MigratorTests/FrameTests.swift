import Migrator
