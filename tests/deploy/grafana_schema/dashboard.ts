// A dashboard of Grafana's, where the options of each kind of panel we use are those of that kind:
// the published type of a dashboard leaves them open.
import type {
  Dashboard as Published,
  Panel as AnyPanel,
  RowPanel,
} from '@grafana/schema/dist/types/raw/dashboard/x/types.gen';
import type * as Heatmap from '@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/types.gen';
import type * as Stat from '@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/types.gen';
import type * as Table from '@grafana/schema/dist/types/raw/composable/table/panelcfg/x/types.gen';
import type * as TimeSeries from '@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen';

type Config = NonNullable<AnyPanel['fieldConfig']>;
type Fields<Custom> = Omit<Config, 'defaults'> & { defaults: Omit<Config['defaults'], 'custom'> & { custom?: Custom } };
type Of<Kind extends string, Options, Custom> = Omit<AnyPanel, 'type' | 'options' | 'fieldConfig'> & {
  type: Kind;
  options: Partial<Options>; // Grafana fills in its defaults
  fieldConfig: Fields<Custom>;
};

export type Panel =
  | Of<'stat', Stat.Options, {}>
  | Of<'table', Table.Options, Partial<Table.FieldConfig>>
  | Of<'timeseries', TimeSeries.Options, TimeSeries.FieldConfig>
  | Of<'heatmap', Heatmap.Options, Heatmap.FieldConfig>;

export type Dashboard = Omit<Published, 'panels'> & { panels: Array<Panel | RowPanel> };
